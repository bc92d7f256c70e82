"""Named starting points for `moray prepare --recipe NAME`."""
