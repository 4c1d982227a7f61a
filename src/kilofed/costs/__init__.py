"""Operations, seconds and memory: measured, and foreseen on models without numbers."""
