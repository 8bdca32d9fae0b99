"""The language of search spaces: YAML to dimensions, conditions, formulas and what a sweep is after."""
