// Stands in for mermaid until a diagram is drawn, because mermaid has megabytes and few pages have a diagram.
// The theme calls initialize and render; the script that they load replaces window.mermaid by mermaid itself.
(function () {
  const local = new URL("mermaid.min.js", document.currentScript.src).href;
  const remote = "https://unpkg.com/mermaid@12/dist/mermaid.min.js";
  let settings;
  let loaded;

  function load(address) {
    return new Promise(function (resolve, reject) {
      const script = document.createElement("script");
      script.src = address;
      script.onload = resolve;
      script.onerror = reject;
      document.head.append(script);
    });
  }

  window.mermaid = {
    initialize: function (given) {
      settings = given;
    },
    render: async function (name, text) {
      loaded = loaded || load(local).catch(function () { return load(remote); }).then(function () {
        window.mermaid.initialize(settings);
      });
      await loaded;
      return window.mermaid.render(name, text);
    },
  };
})();
