"""How a converted net runs fast: fused blocks, compiled regions, a deploy form, CUDA graphs, a depth per image."""
