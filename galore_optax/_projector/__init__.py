# SPDX-License-Identifier: Apache-2.0
"""A projector and its life: projecting, lifting, and the refresh."""
