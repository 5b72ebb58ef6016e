"""What students of mmdet show to the losses."""
