"""The kernels: ordinary Triton functions. Importing one of these modules imports triton."""
