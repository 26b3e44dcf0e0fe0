# SPDX-License-Identifier: Apache-2.0
"""Variational dropout over heads and neurons: makes transformers models really smaller."""

__all__ = ["__version__"]

__version__ = "0.1.0"
