# SPDX-License-Identifier: Apache-2.0
"""Which leaves are projected, and how: decided once, from names and shapes."""
