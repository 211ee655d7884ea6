# SPDX-License-Identifier: Apache-2.0
"""Where every array of a state lies, and how it is kept there."""
