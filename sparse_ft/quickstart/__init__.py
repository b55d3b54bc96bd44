"""The `sparse-ft quickstart` command: cross-lingual transfer on real data, on a CPU."""
