# SPDX-License-Identifier: Apache-2.0
"""Projectors and moments in few bits."""
