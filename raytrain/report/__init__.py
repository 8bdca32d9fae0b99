"""Any set of recorded runs beside one another, at their cost. Reads MLflow; imports no numerics.

From the bottom up: `selection` (which runs), `runs` and `evaluations` (what is recorded of them),
`configurations` (seeds of one configuration), `comparable` (what may be compared with what), `pairs`
(image by image), `answer` (who leads), the figures, `bands`, `sections` and `page` (the HTML).
"""
