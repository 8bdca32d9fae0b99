"""Any set of recorded runs beside one another, at their cost. Reads MLflow; imports no numerics.

From the bottom up: `words` (which runs), `runs` and `evaluations` (what is recorded of them),
`settings` (seeds of one configuration), `arenas` (what may be compared with what), `pairs` (image by
image), the drawings, `page` (the HTML) and `compare` (the command).
"""
