//! Who has been served how much: tenants of equal priority take turns by tokens.

use std::collections::HashMap;

/// Tenants that are remembered though they have nothing open.
const REMEMBERED_MAX: usize = 4096;

/// A counter of served tokens per tenant, as in "Fairness in serving large language models" (Sheng et al. 2024): who
/// comes back after a while does not bring along the time in which nothing was asked for.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    tenants: HashMap<u64, Tenant>,
}

#[derive(Debug, Default)]
struct Tenant {
    served: u64,
    open: usize,
}

impl Tenants {
    /// A sequence of this tenant begins.
    pub(crate) fn enter(&mut self, tenant: u64) {
        let least = self.least_served();
        let t = self.tenants.entry(tenant).or_default();
        if t.open == 0 {
            t.served = t.served.max(least.unwrap_or(0));
        }
        t.open += 1;
    }

    /// A sequence of this tenant ends.
    pub(crate) fn leave(&mut self, tenant: u64) {
        if let Some(t) = self.tenants.get_mut(&tenant) {
            t.open = t.open.saturating_sub(1);
        }
        if self.tenants.len() > REMEMBERED_MAX {
            // Those that are behind would be lifted anyway; the others lose a debt.
            self.tenants.retain(|_, t| t.open > 0);
        }
    }

    /// A step computed `tokens` for this tenant.
    pub(crate) fn charge(&mut self, tenant: u64, tokens: usize) {
        if let Some(t) = self.tenants.get_mut(&tenant) {
            t.served += tokens as u64;
        }
    }

    /// Tokens that were computed for this tenant.
    pub(crate) fn served(&self, tenant: u64) -> u64 {
        self.tenants.get(&tenant).map_or(0, |t| t.served)
    }

    /// Of those that have something open.
    fn least_served(&self) -> Option<u64> {
        self.tenants.values().filter(|t| t.open > 0).map(|t| t.served).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back_is_not_ahead() {
        let mut t = Tenants::default();
        t.enter(1);
        t.charge(1, 1000);
        t.enter(2);
        assert_eq!(t.served(2), 1000);
        t.charge(2, 5);
        t.leave(1);
        t.charge(2, 5000);
        t.enter(1);
        assert_eq!((t.served(1), t.served(2)), (6005, 6005));
        // A debt stays.
        t.charge(1, 100);
        t.leave(1);
        t.enter(1);
        assert_eq!(t.served(1), 6105);
    }

    #[test]
    fn few_are_remembered() {
        let mut t = Tenants::default();
        t.enter(0);
        for tenant in 1..20_000 {
            t.enter(tenant);
            t.leave(tenant);
            assert!(t.tenants.len() <= REMEMBERED_MAX + 1);
        }
        assert_eq!(t.tenants[&0].open, 1);
    }
}
