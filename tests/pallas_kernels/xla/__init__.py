"""Tests of the backend "xla"."""
