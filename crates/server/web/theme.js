'use strict';
// Runs before the page is drawn, so that it never flashes in the wrong colours.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem('oxseek.theme')) ?? 'auto';
} catch { /* no storage: as the system says */ }
