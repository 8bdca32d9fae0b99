"""What each command does, as functions: `train`, `tune`, `evaluate`, `compare`, `export`."""
