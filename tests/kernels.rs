//! Every kernel against its twin on the CPU, at odd sizes, tiled variants bit by bit against plain ones, on every adapter of this machine. No adapter is a failure.

use exflow::engine::{self, KernelCheck};
use exflow::shaders::{Kernel, Weights};
use std::collections::BTreeSet;

#[test]
fn every_kernel_agrees_with_its_twin_on_every_adapter() {
    engine::prepare_process(1);
    let mut checks: Vec<KernelCheck> = Vec::new();
    let passed = engine::selftest(None, &mut |check| checks.push(check.clone())).expect("an adapter");
    let failed: Vec<_> = checks.iter().filter(|check| !check.passed).collect();
    assert!(passed && failed.is_empty(), "{failed:#?}");

    let adapters = engine::devices().len();
    assert!(adapters > 0);
    let cases: usize = Kernel::ALL.iter().map(|kernel| 4 * kernel.variants().len()).sum();
    assert_eq!(checks.len(), adapters * cases, "four sizes of every variant on every adapter");
    let seen: BTreeSet<&str> = checks.iter().map(|check| check.kernel.as_str()).collect();
    assert_eq!(seen.len(), Kernel::ALL.len());
    // Sums of floats in another order differ a little; where nothing does, nothing was compared.
    assert!(checks.iter().any(|check| check.kernel == "linear" && check.max_error > 0.0));
    for device in engine::devices() {
        let ran = |check: &&KernelCheck| {
            check.adapter == device.name && check.case.contains("matrix units") && check.max_error > 0.0
        };
        let count = checks.iter().filter(ran).count();
        match device.matrix_side {
            Some(_) => {
                // Every kind of product with matrices in every type, of which those with scales are there only for fast numerics.
                for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_cooperative()) {
                    for weights in Weights::ALL {
                        let named = format!("{weights:?} weights");
                        let is = |check: &KernelCheck| match weights {
                            Weights::F32 => !check.case.contains("weights"),
                            _ => check.case.contains(&named),
                        };
                        let found = checks.iter().filter(ran).any(|c| c.kernel == kernel.name() && is(c));
                        assert!(
                            found,
                            "{}: {} in {weights:?} not on its matrix units",
                            device.name,
                            kernel.name()
                        );
                    }
                }
            }
            None => {
                eprintln!("{}: skipped: adapter offers no cooperative matrices", device.name);
                assert_eq!(count, 0);
            }
        }
    }
}
