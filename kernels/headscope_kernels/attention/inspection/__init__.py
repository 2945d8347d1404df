"""Reports on what the compiler makes of the kernels, without a GPU. No launch imports this."""
