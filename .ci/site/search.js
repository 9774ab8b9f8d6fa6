// Search of the built-in renderer, in place of a fuzzy one: whole words of titles count most, then headings, prose, code.
(() => {
  "use strict";
  const WEIGHTS = [["title", 12], ["section", 8], ["text", 3], ["code", 1]];
  const words = (text) => text.toLowerCase().split(/[^\p{L}\p{N}.%_-]+/u).filter(Boolean);
  const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  class Search {
    constructor(entries) {
      this.entries = entries.map((item) => ({ item, ...Object.fromEntries(WEIGHTS.map(([key]) => [key, (item[key] || "").toLowerCase()])) }));
    }
    // a word counts by the best field that has it: fully as a word, half as a part of one
    worth(entry, word, whole) {
      let best = 0;
      for (const [key, weight] of WEIGHTS) {
        if (!entry[key].includes(word)) continue;
        const often = Math.min(entry[key].split(word).length - 1, 4);
        best += weight * (whole.test(entry[key]) ? 1 : .5) * (1 + often / 8);
      }
      return best;
    }
    search(query, { limit = 20 } = {}) {
      const wanted = words(query).map((word) => [word, new RegExp(`(?<![\\p{L}\\p{N}])${escaped(word)}(?![\\p{L}\\p{N}])`, "u")]);
      const found = this.entries.map((entry) => {
        const each = wanted.map(([word, whole]) => this.worth(entry, word, whole));
        const hits = each.filter(Boolean).length;
        return { item: entry.item, hits, score: each.reduce((a, b) => a + b, 0) };
      }).filter(({ hits }) => hits);
      const most = Math.max(0, ...found.map(({ hits }) => hits));
      return found.filter(({ hits }) => hits === most).sort((a, b) => b.score - a.score).slice(0, limit);
    }
  }
  window.Fuse = Search;
})();
