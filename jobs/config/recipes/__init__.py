"""Named starting points for `moray pretrain --recipe NAME`."""
