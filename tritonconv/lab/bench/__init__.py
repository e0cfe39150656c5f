"""The laboratory below the public operation: workloads, timing, measured roofs, results files.

:mod:`tritonconv.lab.bench.runner` puts them together; ``tritonconv bench`` runs it.
"""
