"""What people read of the benchmark, made from its records: tables, targets, figures."""
