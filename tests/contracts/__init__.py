"""Components that contracts 1.0 could not express, one for each contract that 2.0 opens, and what they must do."""
