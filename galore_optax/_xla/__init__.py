# SPDX-License-Identifier: Apache-2.0
"""What is said to the compiler: order, layout, and where arrays lie."""
