"""What each kernel is worth on the machine at hand. Installed as `fastvit_benchmarks`."""
