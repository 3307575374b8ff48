"""Tests of the Mosaic GPU forward kernel."""
