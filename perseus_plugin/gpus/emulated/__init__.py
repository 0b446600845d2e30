"""An emulated GPU: a calibrated model of time, power and clock changes, kept in a file that processes share."""
