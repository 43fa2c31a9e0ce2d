"""Executes on a CPU the PTX that Triton compiles for a Hopper GPU (sm_90a), in NumPy, and watches what it does.

Definitions are those of "Parallel Thread Execution ISA", version 8.8 (of CUDA 12.9; 9.0 to 9.4 leave the instructions
below as they are). Whatever is not in the table, be it an instruction, a modifier or a type, raises
NotImplementedError with the text of the instruction.

    program.py       PTX text to instructions, their operands resolved
    formats.py       types: bits of registers to values and back
    memory.py        global and shared memory, and what no program may do to them
    machine.py       threads in lockstep: divergence, barriers, groups of asynchronous operations
    table.py         how an entry of the table is made from a function of values
    instructions.py  the table: arithmetic, comparison, logic, conversion
    movement.py      the table: loads, stores, atomics, cp.async
    collectives.py   the table: what the threads of a warp do together, fences
    matrix.py        the table: ldmatrix, stmatrix, mma, wgmma and its descriptors
    launch.py        puts this in the place of a GPU under Triton's launcher
    plugin.py        counts by kernel and by test

What is caught (`memory.Fault`): accesses out of bounds or misaligned; reads of shared memory that nothing has written,
or that a cp.async may not have written yet; races between the CTAs of a launch, unless a chain of releases and acquires
orders them; races between the warps of a CTA in shared memory, that is a missing barrier; shared memory overwritten
while a wgmma may read it; barriers that only some threads reach; collective instructions without their whole warp.
Registers never written and accumulators of a wgmma that nothing has waited for hold NaN. Asynchronous copies and
products complete as late as the program allows, CTAs run in random order, and so do the atomics of one instruction.

What it is blind to:
- ptxas and SASS: register pressure, spills, miscompilation, the choice of instructions (`test_aot.py` reads them).
- The exact results of approximate instructions (ex2.approx, rsqrt.approx, div.full ...): here they are rounded
  correctly. Tensor cores add with a few bits less than here, and in an order of their own.
- Fences between proxies (fence.proxy.async) and of memory (membar, fence): they do nothing here. Order between CTAs
  comes from the `.acquire`, `.release` and `.acq_rel` of atomics alone, each counted as that of its whole CTA: that a
  barrier stands between the other warps' accesses and the release is not checked.
- Races between threads of one warp, unless one instruction stores two values to one place. If these are alike but for
  rounding, it is counted as contested: see `memory._alike`.
- Races in global memory between warps of one CTA. Of warps that store the same value to one place none is reported.
- Registers of a wgmma that are written before it has read them; wgmma.fence.
- More than one kernel at a time: streams, graphs, programmatic dependent launch, clusters, TMA, mbarriers.
- cuDNN and whatever else is not Triton's; the driver, the caching allocator, time.
"""
