"""Conversions to a smaller cache with what comes around them: healing and measuring."""
