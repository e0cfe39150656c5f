"""The laboratory: what measures, inspects and reports. No call of the layer imports it."""
