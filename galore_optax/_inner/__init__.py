# SPDX-License-Identifier: Apache-2.0
"""The inner optimizer, run on coordinates as if it saw whole weights."""
