"""Ray: a cluster for the time of a command, worker groups for training, a pool of evaluators."""
