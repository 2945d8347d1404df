"""What the compiler makes of the kernels, found out without a GPU. No launch imports this."""
