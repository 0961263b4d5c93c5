//! What doors beside the chat route share.

use axum::Router;

use crate::{relay::Relay, responses::Store, socket::Sockets, state::AppState};

/// Where doors lead, and what they keep. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Doors {
    pub(crate) state: AppState,
    pub(crate) relay: Relay,
    pub(crate) sockets: Sockets,
    pub(crate) store: Store,
}

impl Doors {
    /// Doors that lead to the routes of `http`.
    pub(crate) fn new(state: AppState, http: Router) -> Self {
        Self { state, relay: Relay::new(http), sockets: Sockets::new(), store: Store::new() }
    }
}
