"""From cached targets to losses."""
