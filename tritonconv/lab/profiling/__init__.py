"""Why a layer is as slow as it is: the hardware counters of its kernels."""
