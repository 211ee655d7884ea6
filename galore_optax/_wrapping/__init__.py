# SPDX-License-Identifier: Apache-2.0
"""Wrappers of transformations that hold a projection inside."""
