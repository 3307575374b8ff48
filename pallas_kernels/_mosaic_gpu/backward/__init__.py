"""The backward kernels, and which of them is launched."""
