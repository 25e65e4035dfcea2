//! Client and server sessions against each other, in memory.

mod simulation;
