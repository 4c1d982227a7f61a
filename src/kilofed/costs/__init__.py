"""Operations, seconds and memory: measured, and forecast on models without weights."""
