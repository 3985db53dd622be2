"""What is fuzzed: functions of bytes, each with its seeds and with what must hold whatever the bytes are (docs/fuzzing.md)."""
