//! The sending daemon: intake, queue, shaping, resolve, deliver, classify, jobs, admin.
