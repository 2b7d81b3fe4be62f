"""Quality of pruned decoding: cases, methods, tasks, the harness, tables and plots."""
