"""Quantisation that every target shares: calibration data, ranges, rounding, equalisation, sensitivity and search.

Each target quantises its own finished float32 graph, because that graph is what the file holds: what is observed,
rounded and proven is what will run. What is shared is the mathematics, which knows arrays and no graph.
"""
