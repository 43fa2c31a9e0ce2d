"""Fused kernels of any-depth networks: functional ops, tensors in, tensors out; see `adn_kernels.ops` for all of them.

Each op is a Triton kernel on a GPU and its plain-PyTorch reference anywhere else, known to autograd, `torch.compile`,
`torch.export` and AOTInductor. `bank` picks the live norm and `active` bypasses work by values on the device. Ops with
a trailing underscore write in place.
"""
