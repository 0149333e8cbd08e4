"""What one unit of a meter costs, by hour: pure functions to numbers and to rate rows.

`capital` (owned, colocated, reserved, spot, payback), `energy` (tariffs resolved to UTC hours, bills,
boundary), `pool` (rate rows by price term), `site` (rate rows of a site, and the usage side of peaks and
site hours).
"""
