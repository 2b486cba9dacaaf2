"""The Triton forms of the operations, for CUDA. Imported only where they run: triton need not be installed on a machine without a GPU.

Gradients are derived by hand. Each is checked against float64 references, on CPU through Triton's interpreter.
"""
