# SPDX-License-Identifier: Apache-2.0
"""What a user may ask: reports, energy, and the schedule of refreshes."""
