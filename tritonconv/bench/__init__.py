"""The laboratory below the public operation: workloads, timing, measured roofs, results files.

:mod:`tritonconv.runner` puts them together; ``tritonconv bench`` runs it.
"""
