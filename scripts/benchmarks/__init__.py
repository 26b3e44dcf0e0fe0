# SPDX-License-Identifier: Apache-2.0
"""What `scripts/benchmark.py` is made of: cells that share a dense checkpoint, baselines, measurements, results."""
