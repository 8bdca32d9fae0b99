"""A study: methods at equal cost on one data set, run in the minutes there are, and what it answers."""
