"""Tests of what is around the packages: docs, notebooks, examples, benchmarks."""
